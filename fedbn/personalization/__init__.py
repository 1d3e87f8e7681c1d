"""One file each; a new one is found by being here."""
