"""Where pictures, their captions and the embeddings of these come from."""

TRAIN, HELD_OUT, TEST = 0, 1, 2  # splits
