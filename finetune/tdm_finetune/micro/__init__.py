"""The smallest world that shows the effects of TDM and TDM-R1: 16 x 16 pixels, exact rewards, 1.3 M weights.

A run of any trainer takes at most ten minutes on one CPU thread, so every ablation runs here, with three seeds.
"""
