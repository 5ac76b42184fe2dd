"""What is measured before, during and after training, always from the same noise, and the guards that read it."""
