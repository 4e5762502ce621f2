"""Pictures of what an encoder sees."""
