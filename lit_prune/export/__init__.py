"""The result in other formats, and back; nothing here is imported before it is needed."""
