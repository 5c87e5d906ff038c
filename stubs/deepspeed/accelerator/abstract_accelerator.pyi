from abc import ABC, abstractmethod

class DeepSpeedAccelerator(ABC):
    @abstractmethod
    def device_name(self, device_index: int | None) -> str: ...
