"""The teacher cache: targets on disk, recorded once and trained from many times."""
