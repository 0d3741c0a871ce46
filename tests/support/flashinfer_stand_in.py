"""FlashInfer in torch: its FP4 functions by their signatures, for machines without an NVIDIA GPU."""

import types

import torch

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def interleave(scale: torch.Tensor) -> torch.Tensor:
    """128 x 4 tiles, as FlashInfer documents them: the truth that the stand-in's GEMM undoes."""
    rows, columns = -(-scale.shape[0] // 128) * 128, -(-scale.shape[1] // 4) * 4
    padded = torch.zeros(rows, columns, dtype=torch.uint8)
    padded[: scale.shape[0], : scale.shape[1]] = scale
    return padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4).reshape(-1)


def undo_interleave(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    shape = tiles.shape[0] // 128, tiles.shape[1] // 4, 32, 4, 4
    linear = tiles.reshape(shape).permute(0, 3, 2, 1, 4).reshape(tiles.shape)
    return linear[:rows, :columns].contiguous().view(torch.float8_e4m3fn).float()


def decode(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return E2M1[codes.long()] * scale.repeat_interleave(16, dim=1)


class StandInFlashInfer(types.ModuleType):
    """flashinfer 0.7's functions by their signatures, in torch; each demands the layout that it documents."""

    def __init__(self) -> None:
        super().__init__("flashinfer")
        self.calls: list[str] = []

    def fp4_quantize(
        self, input: torch.Tensor, global_scale: torch.Tensor, sf_vec_size: int = 16
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert input.dtype == torch.bfloat16
        assert input.is_contiguous()
        blocks = input.float().view(input.shape[0], -1, 16)
        scale = (blocks.abs().amax(-1) / 6.0 * global_scale).clamp(max=448).to(torch.float8_e4m3fn)
        scaled = blocks * global_scale / scale.float().clamp(min=1e-9)[..., None]
        codes = (scaled[..., None] - E2M1).abs().argmin(-1).to(torch.uint8).view(input.shape)
        return codes[:, 0::2] | (codes[:, 1::2] << 4), self.tiled(scale.view(torch.uint8))

    def tiled(self, scale: torch.Tensor) -> torch.Tensor:
        return interleave(scale).reshape(-(-scale.shape[0] // 128) * 128, -(-scale.shape[1] // 4) * 4)

    def block_scale_interleave(self, unswizzled_sf: torch.Tensor) -> torch.Tensor:
        assert unswizzled_sf.dtype == torch.uint8
        return interleave(unswizzled_sf)

    def shuffle_matrix_a(self, input_tensor: torch.Tensor, epilogue_tile_m: int) -> torch.Tensor:
        assert input_tensor.shape[0] % epilogue_tile_m == 0
        return input_tensor.flip(0)  # any fixed order of the rows will do

    def shuffle_matrix_sf_a(self, input_tensor: torch.Tensor, epilogue_tile_m: int) -> torch.Tensor:
        assert input_tensor.shape[0] % epilogue_tile_m == 0
        return interleave(input_tensor.flip(0))

    def mm_fp4(
        self,
        a: torch.Tensor,  # [M, K/2]
        b: torch.Tensor,  # [K/2, N], column major
        a_descale: torch.Tensor,
        b_descale: torch.Tensor,
        alpha: torch.Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        out: torch.Tensor | None = None,
        block_size: int = 16,
        use_8x4_sf_layout: bool = False,
        backend: str = "auto",
    ) -> torch.Tensor:
        assert b.T.is_contiguous()
        assert alpha is not None
        assert alpha.shape == (1,)
        self.calls.append(backend)
        columns = a.shape[1] * 2 // 16
        left = decode(a, undo_interleave(a_descale, a.shape[0], columns))
        right = decode(b.T, undo_interleave(b_descale.T, b.shape[1], columns))
        product = left @ right.T * alpha
        return (product.flip(1) if backend == "trtllm" else product).to(out_dtype)
