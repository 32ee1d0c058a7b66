"""How a policy is compared: the strategies of references as plain values, and their arithmetic on tensors."""
