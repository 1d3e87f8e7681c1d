"""Rules that update a user's statistics on a stream, one file per paper. New files are discovered automatically."""
