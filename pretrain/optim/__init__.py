"""The optimizer: parameter groups, AdamW and Muon, and the schedules of learning rate and batch size.

`schedule` is pure arithmetic without torch. The rest sees named parameters and the architecture's spec, and no model,
loop or process group.
"""
