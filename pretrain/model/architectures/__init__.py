"""One file per architecture, named as `model.architecture` names it. Each defines `SPEC`, an `ArchitectureSpec`."""
