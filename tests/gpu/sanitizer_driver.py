"""Runs every kind of kernel and copy once on small tensors, for compute-sanitizer (`make test-gpu`)."""

import torch

import everett_cuda as ev


def main() -> None:
    ev.open("sim:seed=7")
    for dtype in (torch.float32, torch.bfloat16):
        for n in (1, 31, 1025, 40_003):
            x = torch.ones(n + 1, device="cuda", dtype=dtype)[1:].requires_grad_()  # misaligned
            ev.dropout(x, 0.3).backward(torch.ones_like(x))
            ev.dropout_add(x, x.detach(), 0.3, stream="philox").backward(torch.ones_like(x))
            ev.alpha_dropout(x.detach(), 0.001)
        rows = torch.ones(33, 70, device="cuda", dtype=dtype)
        ev.dropout(rows.T, 0.3)
        bias = torch.ones(70, device="cuda", dtype=dtype, requires_grad=True)
        ev.bias_gelu_dropout(rows, bias, 0.3).sum().backward()
        ev.bias_dropout_add(rows, bias, rows, 0.3).sum().backward()
        ev.add_noise(rows, 0.1)
        for call in (ev.rand, ev.randn, ev.exponential, ev.gumbel):
            call(1025, device="cuda", dtype=dtype)
            call(1025, device="cuda", dtype=dtype, freshness="direct")
    ev.stochastic_round(torch.ones(1025, device="cuda"), torch.bfloat16)
    ev.bernoulli(torch.full((1025,), 0.5, device="cuda"))
    ev.random_words(5000, device="cuda", freshness="direct")

    x = torch.ones(5000, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ev.dropout(x, 0.5)
        ev.rand(100, device="cuda", freshness="direct")
    for _ in range(3):
        ev.step()
        graph.replay()
    torch.cuda.synchronize()
    ev.close()
    print("all kernels ran")


if __name__ == "__main__":
    main()
