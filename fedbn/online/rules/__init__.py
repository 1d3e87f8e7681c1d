"""Rules by which statistics follow a stream, one paper a file; a new file is found."""
