"""Disk in, disk out: lazy reading of one layer, the work directory, shards, the format and its exports."""
