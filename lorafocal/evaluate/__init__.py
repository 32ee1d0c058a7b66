"""What a trained model does on held-out prompts: sampled answers, a rule's verdict, and intervals."""
