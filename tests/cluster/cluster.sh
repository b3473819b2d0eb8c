#!/bin/bash
# A real Slurm of four nodes on this machine, for tests: slurmctld, four slurmd, munge, stand-in GPUs; no systemd, no cgroups.
#   cluster.sh up none|dbd DIR    then: export SLURM_CONF=DIR/slurm.conf
#   cluster.sh down x DIR       cluster.sh node NAME DIR: start the node of that name again
# "dbd" adds accounting: slurmdbd with MariaDB. Needs root and Debian's packages, which it installs. SLURM_PORT is the first of
# ten ports, so that several clusters may run at once.
set -euo pipefail
ACT=$1; MODE=$2; D=$3; N=4; PORT=${SLURM_PORT:-16810}; export SLURM_CONF=$D/slurm.conf
poll(){ for _ in $(seq 300); do eval "$1" >/dev/null 2>&1 && return 0; sleep 0.1; done; echo "timeout: $1" >&2; return 1; }
start_node(){
  if unshare -m true 2>/dev/null; then unshare -m sh -c "mount --bind $D/hosts /etc/hosts; exec slurmd -N $1"
  else grep -q node0 /etc/hosts || echo "127.0.0.1 node0 node1 node2 node3" >> /etc/hosts; slurmd -N $1; fi; }
if [ "$ACT" = node ]; then start_node $MODE; scontrol update nodename=$MODE state=resume || true; exit 0; fi
if [ "$ACT" = down ]; then
  for p in $D/slurmd.*.pid $D/slurmctld.pid $D/slurmdbd.pid; do [ -s "$p" ] && kill "$(cat $p)" 2>/dev/null || true; done
  for p in $D/slurmd.*.pid $D/slurmctld.pid $D/slurmdbd.pid; do [ -s "$p" ] && poll "! kill -0 $(cat $p)" || true; done
  [ -s $D/run/my.pid ] && kill "$(cat $D/run/my.pid)" && poll "[ ! -e $D/run/my.pid ]"
  if [ -s $D/munged.started ] && ! pgrep -x slurmctld >/dev/null; then kill "$(cat /run/munge/munged.pid)"; fi; exit 0
fi
PK="slurmctld slurmd slurm-client munge"; [ $MODE = dbd ] && PK="$PK slurmdbd slurm-wlm-mysql-plugin mariadb-server"
dpkg -s $PK >/dev/null 2>&1 || { apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get ${APT_OPTS:-} install -y -qq --no-install-recommends $PK >/dev/null; }
mkdir -p $D/{state,log,dev,run,db}; for i in $(seq 0 $((N-1))); do mkdir -p $D/spool.node$i; done
for i in 0 1; do [ -e $D/dev/gpu$i ] || mknod $D/dev/gpu$i c 1 3; done
cat > $D/slurm.conf <<C
ClusterName=probe
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=cred_expire=5
FirstJobId=$(( $(date +%s) % 60000000 ))
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
JobRequeue=1
SlurmctldPort=$PORT
SlurmdPort=$((PORT+1))
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
DependencyParameters=kill_invalid_depend
MinJobAge=86400
KillWait=3
CompleteWait=0
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
C
if [ $MODE = dbd ]; then cat >> $D/slurm.conf <<C
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$((PORT+2))
AccountingStorageTRES=gres/gpu
C
else echo AccountingStorageType=accounting_storage/none >> $D/slurm.conf; fi
for i in $(seq 0 $((N-1))); do G="Gres=gpu:2"; [ $i = 3 ] && G=""; [ $i = 0 ] && G="$G Feature=fast"
 echo "NodeName=node$i NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((PORT+3+i)) CPUs=4 RealMemory=6000 $G State=UNKNOWN" >> $D/slurm.conf; done
cat >> $D/slurm.conf <<C
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
C
printf 'AutoDetect=off\nNodeName=node[0-2] Name=gpu File=%s/dev/gpu[0-1]\n' $D > $D/gres.conf
(cat /etc/hosts; echo "127.0.0.1 node0 node1 node2 node3") > $D/hosts
if ! munge -n >/dev/null 2>&1; then mkdir -p /run/munge; chown munge: /run/munge; runuser -u munge -- munged; echo y > $D/munged.started; fi
if [ $MODE = dbd ]; then
  chown mysql: $D/db $D/run; chmod o+x $D
  [ -d $D/db/mysql ] || mariadb-install-db --user=mysql --datadir=$D/db --auth-root-authentication-method=socket --skip-test-db >$D/log/install-db.log 2>&1
  mariadbd --no-defaults --user=mysql --datadir=$D/db --socket=$D/run/my.sock --skip-networking --pid-file=$D/run/my.pid --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 >$D/log/mariadb.log 2>&1 </dev/null &
  poll "mariadb-admin --no-defaults -S $D/run/my.sock ping"
  cat > $D/slurmdbd.conf <<C
AuthType=auth/munge
DbdHost=localhost
DbdPort=$((PORT+2))
SlurmUser=root
LogFile=$D/log/slurmdbd.log
PidFile=$D/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
C
  chmod 600 $D/slurmdbd.conf; MYSQL_UNIX_PORT=$D/run/my.sock slurmdbd; poll "sacctmgr -n list cluster"
fi
slurmctld; poll "scontrol ping | grep -q UP"
for i in $(seq 0 $((N-1))); do start_node node$i; done
poll "[ \"\$(sinfo -h -p debug -t idle -o %D)\" = $N ]"; sinfo
