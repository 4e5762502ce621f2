"""Images in tar files of many: how they are indexed, read and written."""
