"""Small helpers of training scripts: optimisers and weight averages."""
