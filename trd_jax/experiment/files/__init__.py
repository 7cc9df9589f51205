"""Files on disk: whose they are, how they are locked and written whole."""
