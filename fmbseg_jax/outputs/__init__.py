"""What people look at: colours, overlays, sheets, COCO files, folders of results."""
