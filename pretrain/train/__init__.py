"""The training program: build, feed, step, record, validate, save, resume. Knows no sharding and no file format."""
