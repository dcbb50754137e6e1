"""Turning images from one orientation into another."""

import numpy as np

from mail_wrappers.images import turn_images


def test_turning_images_back_gives_the_images():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    for have in ("raw", "upright", "rot180"):
        for want in ("raw", "upright", "rot180"):
            there = turn_images(images, have, want)
            assert np.array_equal(turn_images(there, want, have), images)
            assert np.array_equal(there, images) == (have == want)
    assert np.array_equal(turn_images(images, "raw", "upright"), images[:, ::-1])
    assert np.array_equal(turn_images(images, "raw", "rot180"), images[:, ::-1, ::-1])
    assert np.array_equal(turn_images(images[0], "raw", "upright"), images[0, ::-1])
