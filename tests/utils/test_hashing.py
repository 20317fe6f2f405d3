"""Hashes of tensors."""

import torch

from decinb.utils.hashing import tensor_hash


def test_every_bit_of_a_tensor_counts():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64):
        tensor = torch.randn(5, 333, generator=generator).to(dtype)
        before = tensor_hash(tensor)
        bits = tensor.view(-1).view(torch.uint8)
        for at in torch.randint(len(bits), (50,), generator=generator):
            old = bits[at].item()
            bits[at] = 1 - old if dtype == torch.bool else old ^ (1 << (int(at) % 8))
            assert tensor_hash(tensor) != before
            bits[at] = old
        assert tensor_hash(tensor) == before


def test_signs_and_places_count_and_layout_does_not():
    tensor = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    hashes = [tensor_hash(one) for one in (tensor, -tensor, tensor.flip(0), tensor.roll(1), tensor.transpose(2, 3))]
    two_signs = tensor.clone()
    two_signs.view(-1)[[1, 3]] *= -1  # in the high halves of two words
    assert len({*hashes, tensor_hash(two_signs)}) == 6
    assert tensor_hash(tensor.to(memory_format=torch.channels_last)) == hashes[0]
    assert tensor_hash(torch.cat([torch.zeros(1), tensor.view(-1)])[1:].view_as(tensor)) == hashes[0]
    assert tensor_hash(torch.zeros(0)) == "" and len(tensor_hash(torch.tensor(1.0))) == 8
