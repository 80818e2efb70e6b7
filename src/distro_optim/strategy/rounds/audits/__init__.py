"""Audits while a run goes on: who audits whom, what auditors report, and what comes of it. No I/O.

=====================  ==========================================================================
``reports``            what an auditor found, signed, as bytes
``docket``             audits that are under way, and whose reports on them count, for either test
``book``               reports of one run, and the rule by which several of them decide
``watch``              audits of the rounds of a run: drawn, asked for, told, settled
``momentum_messages``  likewise for test 2: commitments, openings and reports, as bytes
``momentum_book``      its reports, its rule, and the limits that are learnt
``momentum_watch``     its audits as rounds go by
=====================  ==========================================================================
"""
