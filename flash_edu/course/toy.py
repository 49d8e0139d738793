"""The one toy of chapters 01 to 09: four words, head dimension 4, scores that can be checked by hand.

The keys are chosen so that scores are read off a query: keys 0, 1, 2 pick its first three numbers, and key 3
takes half of its sum. Each row of scores shows one case that a softmax meets:

    the   [ 4,  1,  0,  2]   the maximum comes first: nothing to repair when the rest arrives
    cat   [ 2,  2,  2,  2]   all equal: the output is the plain mean of v, [1, 2]
    sat   [ 1,  3,  2,  5]   the maximum comes last, and moves three times on the way
    down  [-3, -1, -4, -2]   all below zero: a padded score of 0 would beat every real one
"""
import torch

words = ["the", "cat", "sat", "down"]
q = torch.tensor([[4, 1, 0, -1], [2, 2, 2, -2], [1, 3, 2, 4], [-3, -1, -4, 4]], dtype=torch.float32)  # (4, 4)
k = torch.tensor([[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [1, 1, 1, 1]], dtype=torch.float32)  # (4, 4)
v = torch.tensor([[1, 0], [0, 1], [2, 2], [1, 5]], dtype=torch.float32)  # (4, 2)
scale = 0.5  # 1 / sqrt(4)
scores = q @ k.T * scale  # (4, 4)
