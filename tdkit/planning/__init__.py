"""What becomes of each weight: policies, plans, and how a parameter budget is shared."""
