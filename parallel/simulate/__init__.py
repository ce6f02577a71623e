"""The dry run: any rank of any layout in one process, with memory and communication counted."""
