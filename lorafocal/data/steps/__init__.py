"""What is done to training pairs between reading and tokenising: `data.steps`, each step a function in its own file."""
