"""Exporting encoders to other libraries, each export verified there before it is kept."""
