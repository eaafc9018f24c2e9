"""The 79 features of a flow: their order, names and units, and the digest that binds a model to them.

The order is that of the earlier CyberMesh. Meanings are those of the fixed CICFlowMeter, with every open question settled by
the project's rulings; ``features_compute`` derives the values from a flow's integer state. Raise ``DEFINITION_VERSION``
whenever a value would come out differently for the same packets: models name the digest they were trained under.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Feature(NamedTuple):
    """A column: our name, CICFlowMeter's (the corrected data sets of 2022), and the unit."""

    name: str
    cic: str
    unit: str


DEFINITION_VERSION = 1

FEATURES = (
    Feature("src_port", "Src Port", "port"),
    Feature("dst_port", "Dst Port", "port"),
    Feature("protocol", "Protocol", "number"),
    Feature("flow_duration", "Flow Duration", "us"),
    Feature("tot_fwd_pkts", "Total Fwd Packet", "count"),
    Feature("tot_bwd_pkts", "Total Bwd packets", "count"),
    Feature("totlen_fwd_pkts", "Total Length of Fwd Packet", "bytes"),
    Feature("totlen_bwd_pkts", "Total Length of Bwd Packet", "bytes"),
    Feature("fwd_pkt_len_max", "Fwd Packet Length Max", "bytes"),
    Feature("fwd_pkt_len_min", "Fwd Packet Length Min", "bytes"),
    Feature("fwd_pkt_len_mean", "Fwd Packet Length Mean", "bytes"),
    Feature("fwd_pkt_len_std", "Fwd Packet Length Std", "bytes"),
    Feature("bwd_pkt_len_max", "Bwd Packet Length Max", "bytes"),
    Feature("bwd_pkt_len_min", "Bwd Packet Length Min", "bytes"),
    Feature("bwd_pkt_len_mean", "Bwd Packet Length Mean", "bytes"),
    Feature("bwd_pkt_len_std", "Bwd Packet Length Std", "bytes"),
    Feature("flow_byts_s", "Flow Bytes/s", "bytes/s"),
    Feature("flow_pkts_s", "Flow Packets/s", "packets/s"),
    Feature("flow_iat_mean", "Flow IAT Mean", "us"),
    Feature("flow_iat_std", "Flow IAT Std", "us"),
    Feature("flow_iat_max", "Flow IAT Max", "us"),
    Feature("flow_iat_min", "Flow IAT Min", "us"),
    Feature("fwd_iat_tot", "Fwd IAT Total", "us"),
    Feature("fwd_iat_mean", "Fwd IAT Mean", "us"),
    Feature("fwd_iat_std", "Fwd IAT Std", "us"),
    Feature("fwd_iat_max", "Fwd IAT Max", "us"),
    Feature("fwd_iat_min", "Fwd IAT Min", "us"),
    Feature("bwd_iat_tot", "Bwd IAT Total", "us"),
    Feature("bwd_iat_mean", "Bwd IAT Mean", "us"),
    Feature("bwd_iat_std", "Bwd IAT Std", "us"),
    Feature("bwd_iat_max", "Bwd IAT Max", "us"),
    Feature("bwd_iat_min", "Bwd IAT Min", "us"),
    Feature("fwd_psh_flags", "Fwd PSH Flags", "count"),
    Feature("bwd_psh_flags", "Bwd PSH Flags", "count"),
    Feature("fwd_urg_flags", "Fwd URG Flags", "count"),
    Feature("bwd_urg_flags", "Bwd URG Flags", "count"),
    Feature("fwd_header_len", "Fwd Header Length", "bytes"),
    Feature("bwd_header_len", "Bwd Header Length", "bytes"),
    Feature("fwd_pkts_s", "Fwd Packets/s", "packets/s"),
    Feature("bwd_pkts_s", "Bwd Packets/s", "packets/s"),
    Feature("pkt_len_min", "Packet Length Min", "bytes"),
    Feature("pkt_len_max", "Packet Length Max", "bytes"),
    Feature("pkt_len_mean", "Packet Length Mean", "bytes"),
    Feature("pkt_len_std", "Packet Length Std", "bytes"),
    Feature("pkt_len_var", "Packet Length Variance", "bytes2"),
    Feature("fin_flag_cnt", "FIN Flag Count", "count"),
    Feature("syn_flag_cnt", "SYN Flag Count", "count"),
    Feature("rst_flag_cnt", "RST Flag Count", "count"),
    Feature("psh_flag_cnt", "PSH Flag Count", "count"),
    Feature("ack_flag_cnt", "ACK Flag Count", "count"),
    Feature("urg_flag_cnt", "URG Flag Count", "count"),
    Feature("cwe_flag_count", "CWR Flag Count", "count"),
    Feature("ece_flag_cnt", "ECE Flag Count", "count"),
    Feature("down_up_ratio", "Down/Up Ratio", "ratio"),
    Feature("pkt_size_avg", "Average Packet Size", "bytes"),
    Feature("fwd_seg_size_avg", "Fwd Segment Size Avg", "bytes"),
    Feature("bwd_seg_size_avg", "Bwd Segment Size Avg", "bytes"),
    Feature("fwd_byts_b_avg", "Fwd Bytes/Bulk Avg", "bytes"),
    Feature("fwd_pkts_b_avg", "Fwd Packet/Bulk Avg", "count"),
    Feature("fwd_blk_rate_avg", "Fwd Bulk Rate Avg", "bytes/s"),
    Feature("bwd_byts_b_avg", "Bwd Bytes/Bulk Avg", "bytes"),
    Feature("bwd_pkts_b_avg", "Bwd Packet/Bulk Avg", "count"),
    Feature("bwd_blk_rate_avg", "Bwd Bulk Rate Avg", "bytes/s"),
    Feature("subflow_fwd_pkts", "Subflow Fwd Packets", "count"),
    Feature("subflow_fwd_byts", "Subflow Fwd Bytes", "bytes"),
    Feature("subflow_bwd_pkts", "Subflow Bwd Packets", "count"),
    Feature("subflow_bwd_byts", "Subflow Bwd Bytes", "bytes"),
    Feature("init_fwd_win_byts", "FWD Init Win Bytes", "bytes"),
    Feature("init_bwd_win_byts", "Bwd Init Win Bytes", "bytes"),
    Feature("fwd_act_data_pkts", "Fwd Act Data Pkts", "count"),
    Feature("fwd_seg_size_min", "Fwd Seg Size Min", "bytes"),
    Feature("active_mean", "Active Mean", "us"),
    Feature("active_std", "Active Std", "us"),
    Feature("active_max", "Active Max", "us"),
    Feature("active_min", "Active Min", "us"),
    Feature("idle_mean", "Idle Mean", "us"),
    Feature("idle_std", "Idle Std", "us"),
    Feature("idle_max", "Idle Max", "us"),
    Feature("idle_min", "Idle Min", "us"),
)

NAMES = tuple(feature.name for feature in FEATURES)
UNITS = {feature.name: feature.unit for feature in FEATURES}
CIC_NAMES = {feature.name: feature.cic for feature in FEATURES}
COLUMN = {name: index for index, name in enumerate(NAMES)}
DEFINITION_HASH = hashlib.sha256("\n".join([f"cybermesh flow features {DEFINITION_VERSION}", *NAMES]).encode()).hexdigest()

assert len(COLUMN) == 79
