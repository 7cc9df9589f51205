"""Is an answer right, and what do graded answers add up to?"""
