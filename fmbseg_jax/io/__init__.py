"""Bytes on disk: whole files or none, checked text and JSON, errors of the machine."""
