"""The program: config, model, optimizer, training, checkpoints, report, command line."""
