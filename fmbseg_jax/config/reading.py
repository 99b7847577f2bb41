"""How image files are read, as a config says it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Reading:
    """How image files are read; the same in every stage, since records hold the files."""

    deep: str = "file"
    """What scales more than 8 bits a channel, "file" or "type"; see `deep.to_8_bits`."""
    megapixels: int = 178
    """The most pixels of an image, in millions: a small file may claim to be a huge image."""
    prefix: str = dataclasses.field(default="", compare=False)
    """What stands before `deep` and `max_megapixels` where they are set: "--config.data."."""

    def of_deep(self, count: int, example: str) -> str:
        """What a program says, once, of the deep images it has read; "" where there are none.

        Args:
          count: of these images.
          example: the name of one.
        """
        if not count:
            return ""
        images = f"1 image, {example}, has" if count == 1 else f"{count:,} images have"
        such = "" if count == 1 else f", such as {example}"
        if self.deep == "type":
            how = "by what its type holds"
            other = "file scales from its lowest to its highest value"
        else:
            how = "from its lowest to its highest value"
            other = "type scales by what the type holds"
        return (
            f"{images} more than 8 bits a channel{such}: each is scaled {how}; "
            f"{self.prefix}deep={other}."
        )


USUAL = Reading()
