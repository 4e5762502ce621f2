"""Features of a folder of images: as a table, as a page to browse, or in memory."""
