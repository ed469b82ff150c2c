import torch

from tlora.linalg.bases import singular_part


def weight(rows=7, columns=5):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_principal_and_minor_parts_add_up_to_the_matrix():
    w = weight()
    b, a = singular_part(w, 2)
    rest_b, rest_a = singular_part(w, 3, minor=True)
    assert (b.shape, a.shape) == ((7, 2), (2, 5))
    torch.testing.assert_close(b @ a + rest_b @ rest_a, w)


def test_the_parts_are_the_largest_and_the_smallest_components():
    w = weight()
    values = torch.linalg.svdvals(w)
    for minor, kept in ((False, values[:2]), (True, values[-2:])):
        b, a = singular_part(w, 2, minor=minor)
        torch.testing.assert_close(torch.linalg.svdvals(b @ a)[:2], kept)


def test_both_factors_carry_the_root_of_each_singular_value():
    w = weight()
    b, a = singular_part(w, 3, minor=True)
    expected = torch.diag(torch.linalg.svdvals(w)[-3:])
    torch.testing.assert_close(b.T @ b, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a @ a.T, expected, rtol=1e-4, atol=1e-5)
