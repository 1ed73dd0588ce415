/* Two events of one key, two processes: who may run. Described in README.md, searched by test_key.py.

   The row's part is that of claim.pml, reduced: a claim, HOLD, the handler, mark and COMMIT, a failure, a release, a
   lease that ends, a process that dies at any step. What is searched here is the lock of the key beside it. */

#ifndef ATTEMPTS
#define ATTEMPTS 3
#endif

#define PENDING 0
#define PROCESSING 1
#define COMPLETED 2

byte row[2];               /* the status of each event */
byte attempt[2];
byte row_lock[2];          /* the process whose transaction holds the row; 0: free */
byte key_lock = 0;         /* the process whose transaction has the lock of the key; 0: free */
byte at_work[3];           /* 1 + the event whose handler runs in a transaction of this process; 0: none */

bit calm = 0;              /* no more faults */

bool K1_one_at_a_time_per_key = false;
bool K2_who_waits_for_a_key_is_not_charged = false;
bool K3_nobody_waits_in_a_slot = false;

#define CHECK(name, holds) assert(name || (holds))
#define DONE (row[0] == COMPLETED && row[1] == COMPLETED) /* else somebody can always go on, or Spin finds it */
#define OURS (row[e] == PROCESSING && attempt[e] == claim)

inline check_state() {
    CHECK(K1_one_at_a_time_per_key, at_work[1] == 0 || at_work[2] == 0)
}

/* The transaction ends, however it does: the server frees both locks together. */
inline end_transaction(who) {
    at_work[who] = 0;
    if
    :: row_lock[0] == who -> row_lock[0] = 0
    :: else
    fi;
    if
    :: row_lock[1] == who -> row_lock[1] = 0
    :: else
    fi;
    if
    :: key_lock == who -> key_lock = 0
    :: else
    fi
}

inline hold() {
    row_lock[e] = me;
#ifdef M_KEY_NOT_LOCKED
    has_key = 1
#else
    has_key = (key_lock == 0);
    if
    :: has_key -> key_lock = me
    :: else
    fi
#endif
}

active [2] proctype process() {
    byte me, e, claim;
    bit has_key, charged;
    me = _pid + 1;
idle:
    atomic {
        e = 0; claim = 0; has_key = 0; charged = 0;
        do /* recovery, or a delivery: take an event over */
        :: row[0] == PENDING && row_lock[0] == 0 && (calm || attempt[0] < ATTEMPTS) -> e = 0; break
        :: row[1] == PENDING && row_lock[1] == 0 && (calm || attempt[1] < ATTEMPTS) -> e = 1; break
        :: DONE -> goto done
        od;
        row[e] = PROCESSING;
        attempt[e] = (attempt[e] < ATTEMPTS + 1 -> attempt[e] + 1 : attempt[e]);
        claim = attempt[e];
        check_state()
    }
    if
    :: !calm -> goto idle  /* it dies, or its release is lost: the lease ends */
    :: skip
    fi;
    atomic {
        if
        :: OURS && row_lock[e] == 0 -> hold()
        :: !(OURS && row_lock[e] == 0) -> goto idle
        fi
    }
#ifndef M_KEY_IGNORED
    if
    :: has_key -> skip
    :: !has_key ->
#ifdef M_KEY_WAITED_FOR
        atomic { CHECK(K3_nobody_waits_in_a_slot, false); key_lock == 0 -> key_lock = me; has_key = 1 }
#else
        atomic { end_transaction(me); check_state() }
#ifdef M_WAIT_IS_CHARGED
        charged = 1;
#endif
        atomic {
            CHECK(K2_who_waits_for_a_key_is_not_charged, !charged);
            if
            :: OURS -> row[e] = PENDING
            :: else
            fi;
            goto idle
        }
#endif
    fi;
#endif
    atomic { at_work[me] = e + 1; check_state() }
    atomic {
        if
        :: skip -> /* mark and COMMIT */
            if
            :: OURS -> row[e] = COMPLETED
            :: else
            fi;
            end_transaction(me)
        :: !calm -> end_transaction(me); if :: OURS -> row[e] = PENDING :: else fi /* it fails, and is charged */
        :: !calm -> end_transaction(me) /* the process dies, or the server ends the transaction of a frozen one */
        fi;
        check_state();
        goto idle
    }
done:
    skip
}

active proctype world() {
    do
    :: atomic { row[0] == PROCESSING && row_lock[0] == 0 && (calm || attempt[0] <= ATTEMPTS) -> row[0] = PENDING }
    :: atomic { row[1] == PROCESSING && row_lock[1] == 0 && (calm || attempt[1] <= ATTEMPTS) -> row[1] = PENDING }
    :: atomic { !calm -> calm = 1 }
    :: DONE -> break
    od
}
