"""What a run will do and cost, said before its first step."""
