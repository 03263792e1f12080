"""What a student is worth: accuracies of both heads, which weights to keep, what validation images can improve."""
