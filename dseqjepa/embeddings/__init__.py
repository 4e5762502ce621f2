"""A folder of images as a table of features, and what can be read off it."""
