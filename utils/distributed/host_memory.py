"""CPU memory of this machine."""


def free_bytes() -> int:
    """What all processes of this machine may still take together."""
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":") for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024
