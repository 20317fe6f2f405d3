"""What the notebooks need besides the tools they teach: what suits a model, what can be measured, and answers."""
