"""A platform plugin with which SGLang serves from a plain CPU."""

from __future__ import annotations


def activate() -> str:
    return "tercet_sglang_cpu.CpuPlatform"


def __getattr__(name: str):
    # SGLang asks for the class when its own modules can be imported, not before.
    if name != "CpuPlatform":
        raise AttributeError(name)
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

    class CpuPlatform(CpuDeviceMixin, SRTPlatform):
        _enum = PlatformEnum.OOT
        capabilities = PlatformCapabilities()

        def is_pin_memory_available(self, *_) -> bool:
            return False

        def get_default_attention_backend(self, *_) -> str:
            return "torch_native"

    globals()[name] = CpuPlatform
    return CpuPlatform
