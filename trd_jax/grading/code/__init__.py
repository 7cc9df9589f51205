"""Does a program that a model wrote pass its tests?"""
