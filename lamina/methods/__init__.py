"""One file each; nothing here but settings and composition."""
