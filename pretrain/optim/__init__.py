"""The optimizer: parameter groups, AdamW and Muon, and the schedules of learning rate and batch size.

`schedule` is pure arithmetic without torch; the rest knows parameters by name, and no model, loop or process group.
"""
