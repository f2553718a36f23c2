"""Numbers and noise bits that a change of the code's shape must not move.

The hashes were written by the code before `mmbal_fast.training` was cut out of the methods. They
hold for every backend without FMA differences: inputs are small whole numbers over powers of two.
"""
