"""Is a mathematical answer equal to the reference?"""
