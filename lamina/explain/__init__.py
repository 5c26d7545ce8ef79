"""What a model looks at: maps over the patches of an image, block by block, as numbers, as a picture and as a page."""
