"""One file per architecture; each defines `SPEC`, an `ArchitectureSpec`, under the name that `model.architecture` gives."""
