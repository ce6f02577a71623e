"""Reading raw text: files, folders and datasets become documents, in chunks that workers read in parallel."""
