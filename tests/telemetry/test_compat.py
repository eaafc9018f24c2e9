"""The original tool's documented faults, one test each."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest

from cybermesh.telemetry.compat import CompatMeter
from cybermesh.telemetry.features import COLUMN
from cybermesh.telemetry.flows import EndReason, FlowBatch
from cybermesh.telemetry.packets import ACK, FIN, PSH, RST, SYN, URG, PacketBatch
from cybermesh.telemetry.sources.choose import open_source
from tests.telemetry import frames
from tests.telemetry.sources import captures

A, B = frames.V4_A, frames.V4_B


def there(flags: int, size: int = 0, *, window: int = 1000, port: int = 5000) -> bytes:
    return frames.ethernet(frames.ipv4(6, frames.tcp(port, 80, flags, b"x" * size, window=window), src=A, dst=B))


def back(flags: int, size: int = 0, *, window: int = 2000, port: int = 5000) -> bytes:
    return frames.ethernet(frames.ipv4(6, frames.tcp(80, port, flags, b"x" * size, window=window), src=B, dst=A))


def metered(
    folder: Path, *packets: tuple[float, bytes], block: int = 1000, max_flows: int = 1 << 20
) -> tuple[FlowBatch, CompatMeter]:
    path = folder / "compat.pcap"
    path.write_bytes(captures.pcap([(1_000_000_000 + round(1e6 * seconds), packet) for seconds, packet in packets]))
    meter, found = CompatMeter(max_flows=max_flows), []
    with contextlib.closing(open_source(str(path), block=block)) as source:
        for batch in source.batches():
            assert isinstance(batch, PacketBatch)
            found.append(meter.add(batch))
    found.append(meter.flush())
    columns = [np.concatenate([getattr(batch, name) for batch in found]) for name in FlowBatch.__slots__ if name != "known"]
    return FlowBatch(*columns, known=found[-1].known), meter


def of(flows: FlowBatch, *names: str, row: int = 0) -> list[float]:
    return [float(flows.features[row, COLUMN[name]]) for name in names]


def test_the_first_fin_ends_a_flow_and_what_follows_is_another(tmp_path: Path) -> None:
    flows, _ = metered(
        tmp_path, (0, there(SYN)), (1, back(SYN | ACK)), (2, there(FIN | ACK)), (3, back(FIN | ACK)), (4, there(ACK))
    )
    assert flows.end_reason.tolist() == [EndReason.TCP_END, EndReason.TCP_END, EndReason.CAPTURE_END]
    assert (flows.features[:, 4] + flows.features[:, 5]).tolist() == [3, 1, 1]
    assert flows.sport.tolist() == [5000, 80, 5000]


def test_a_reset_ends_nothing(tmp_path: Path) -> None:
    flows, _ = metered(tmp_path, (0, there(SYN)), (1, back(RST | ACK)), (2, there(SYN)))
    assert len(flows) == 1
    assert of(flows, "rst_flag_cnt", "tot_fwd_pkts") == [0, 2]


def test_a_flow_is_cut_after_120_seconds_and_a_single_packet_is_dropped_by_it(tmp_path: Path) -> None:
    flows, meter = metered(tmp_path, (0, there(ACK)), (120, there(ACK)), (120.000001, there(ACK)), (300, back(ACK)))
    assert (flows.features[:, 4] + flows.features[:, 5]).tolist() == [2, 1]
    assert flows.end_reason.tolist() == [EndReason.CUT, EndReason.CAPTURE_END]
    assert meter.dropped == 1


def test_forward_is_the_first_sender_even_of_a_syn_ack(tmp_path: Path) -> None:
    flows, _ = metered(tmp_path, (0, back(SYN | ACK)), (1, there(ACK)))
    assert (flows.sport[0], flows.dport[0]) == (80, 5000)


def test_only_tcp_and_udp_have_a_protocol(tmp_path: Path) -> None:
    ping = frames.ethernet(frames.ipv4(1, frames.icmp(8, 0, b"x" * 20), src=A, dst=B))
    other = frames.ethernet(frames.ipv4(47, b"\0" * 30, src=B, dst=A))
    flows, _ = metered(tmp_path, (0, ping), (1, other))
    assert of(flows, "protocol", "src_port", "tot_fwd_pkts", "tot_bwd_pkts", "fwd_header_len", "init_fwd_win_byts") == [
        0, 0, 1, 1, 0, -1,
    ]  # fmt: skip


def test_times_are_not_put_in_order(tmp_path: Path) -> None:
    flows, _ = metered(tmp_path, (2, there(ACK)), (0, there(ACK)), (1, there(ACK)))
    assert of(flows, "flow_duration", "flow_iat_min", "flow_iat_max", "flow_pkts_s") == [-1e6, -2e6, 1e6, -3]


def test_times_of_ipv6_are_milliseconds(tmp_path: Path) -> None:
    packet = frames.ethernet(frames.ipv6(17, frames.udp(1, 2, b"x")))
    flows, _ = metered(tmp_path, (0, packet), (10, packet))
    assert of(flows, "flow_duration", "flow_iat_max", "idle_max") == [10_000, 10_000, 0]
    assert (flows.end_us - flows.start_us).tolist() == [10_000_000]


def test_the_first_length_counts_twice(tmp_path: Path) -> None:
    flows, _ = metered(tmp_path, (0, there(PSH, 10)), (1, back(PSH, 40)), (2, there(PSH, 20)))
    lengths = np.array([10, 10, 40, 20])
    assert of(flows, "pkt_len_mean", "pkt_size_avg", "fwd_pkt_len_mean") == [20, 80 / 3, 15]
    assert of(flows, "pkt_len_std", "pkt_len_var") == pytest.approx([lengths.std(ddof=1), lengths.var(ddof=1)])
    assert of(flows, "pkt_len_min", "pkt_len_max", "flow_byts_s") == [10, 40, 35]


def test_flags_are_those_of_the_first_packet_only(tmp_path: Path) -> None:
    flows, _ = metered(tmp_path, (0, there(SYN | URG)), (1, back(SYN | ACK | PSH | URG)), (2, there(PSH | ACK)))
    names = ("syn_flag_cnt", "urg_flag_cnt", "psh_flag_cnt", "ack_flag_cnt", "fwd_psh_flags", "fwd_urg_flags")
    assert of(flows, *names, "bwd_psh_flags", "bwd_urg_flags") == [1, 1, 0, 0, 1, 1, 0, 0]


def test_windows_are_minus_one_where_there_are_none_and_the_backward_one_is_the_last(tmp_path: Path) -> None:
    flows, _ = metered(tmp_path, (0, there(SYN)), (1, back(ACK, window=7)), (2, back(ACK, window=9)), (3, there(ACK, window=5)))
    assert of(flows, "init_fwd_win_byts", "init_bwd_win_byts") == [1000, 9]
    flows, _ = metered(tmp_path, (0, there(SYN)))
    assert of(flows, "init_fwd_win_byts", "init_bwd_win_byts") == [1000, -1]
    flows, _ = metered(tmp_path, (0, frames.ethernet(frames.ipv4(17, frames.udp(1, 2, b"x")))))
    assert of(flows, "init_fwd_win_byts", "fwd_header_len", "fwd_seg_size_min") == [-1, 8, 8]


def test_counts_and_ratios_are_the_original_ones(tmp_path: Path) -> None:
    data = [(n / 10, there(PSH, 5)) for n in range(5)] + [(1 + n / 10, back(PSH, 9)) for n in range(9)] + [(4, there(PSH, 1))]
    flows, _ = metered(tmp_path, *data)
    assert of(flows, "fwd_act_data_pkts", "down_up_ratio", "fwd_byts_b_avg", "bwd_pkts_b_avg") == [5, 1, 0, 0]
    assert of(flows, "subflow_fwd_pkts", "subflow_fwd_byts", "subflow_bwd_pkts", "subflow_bwd_byts") == [6, 26, 9, 81]


def test_rates_of_a_flow_without_duration_are_not_numbers(tmp_path: Path) -> None:
    flows, _ = metered(tmp_path, (0, there(SYN)), (1, there(ACK, 3, port=6000)))
    assert math.isnan(of(flows, "flow_byts_s")[0])
    assert of(flows, "flow_byts_s", row=1) == [math.inf]
    assert of(flows, "flow_pkts_s", "fwd_pkts_s", "bwd_pkts_s") == [math.inf, 0, 0]


def test_active_and_idle_are_told_by_gaps_over_five_seconds(tmp_path: Path) -> None:
    flows, _ = metered(tmp_path, (0, there(ACK)), (1, there(ACK)), (6, there(ACK)), (12, there(ACK)), (13, there(ACK)))
    assert of(flows, "active_mean", "active_max", "idle_mean", "idle_std") == [6e6, 6e6, 6e6, 0]


def test_blocks_and_the_cap_are_as_for_other_meters(tmp_path: Path) -> None:
    packets = [(n / 100, there(ACK, n, port=5000 + n % 7)) for n in range(60)]
    whole, _ = metered(tmp_path, *packets)
    assert metered(tmp_path, *packets, block=7)[0].features.tolist() == whole.features.tolist()
    cut, meter = metered(tmp_path, *packets, max_flows=3)
    assert meter.evicted == len(cut) - 3
    assert cut.features[:, 4].sum() == 60
    assert len(meter) == 0
