"""Raw text in: files, folders and data sets become documents, in chunks that workers share out."""
